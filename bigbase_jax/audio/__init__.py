"""Sound: files in, samples and features out."""
