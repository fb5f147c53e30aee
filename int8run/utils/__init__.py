"""Small tools that know nothing of models: a cache on disk, the machine, and timing."""
