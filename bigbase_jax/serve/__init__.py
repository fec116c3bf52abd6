"""Models over HTTP. It knows no modality: the predictor, its codec and the task's postprocessing do."""
