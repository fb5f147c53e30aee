"""Options for int8run: an outlier method, a backend, a metric, a model family and a prompt set."""
