"""The fixtures of the tests of whole runs."""

from tests.integration.conftest import *  # noqa: F403
