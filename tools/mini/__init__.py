"""The mini bundle: scenes to train on, training, evaluation."""
