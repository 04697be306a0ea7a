"""Every performance claim of waterfill is a command here: ``python -m bench.NAME``."""
