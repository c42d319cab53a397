"""The parts of `surefoot demo`: text, model, recipes, training, progress, report, picture."""
