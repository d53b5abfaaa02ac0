from tests.app.conftest import config

__all__ = ["config"]
