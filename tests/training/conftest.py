from tests.training.tiny import text, tiny

__all__ = ["text", "tiny"]
