"""What tests of data share."""

from pathlib import Path

import pytest

from fedexperts.data.pack import data_folder
from fedexperts.errors import BadData


@pytest.fixture(scope="session")
def pack() -> Path:
    """The folder of the data pack; a test that asks for it is skipped where there is none."""
    try:
        return data_folder()
    except BadData as error:
        pytest.skip(str(error))
