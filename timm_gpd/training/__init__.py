"""The parts of ``train.py`` and ``validate.py``, one to a file."""
