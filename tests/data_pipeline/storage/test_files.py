"""Locks on files."""

import errno
import fcntl

import pytest

from data_pipeline.storage.files import take_lock


def test_a_lock_that_another_one_has_is_waited_for_and_one_that_is_not_allowed_is_not(tmp_path):
    with (tmp_path / "file").open("w") as one, (tmp_path / "file").open("w") as other:
        assert take_lock(one, 0) and not take_lock(other, 0)
        one.close()
        assert take_lock(other, 0, lock=fcntl.flock)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.raises(PermissionError):
        take_lock(0, lock=refuse)
