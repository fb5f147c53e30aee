"""Step caches: what is reused of earlier denoising steps in place of computing it again."""
