from tests.training.tiny import one_thread, text, tiny

__all__ = ["one_thread", "text", "tiny"]
