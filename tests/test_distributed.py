"""
python -m pytest tests/test_distributed.py

Ranks that agree, and signals that ask for a stop. test_train.py has two real ranks, and two runs in one folder.
"""
import os
import signal

import pytest
import torch

import distributed
from common import UserError
from distributed import Ranks, check_ranks_agree, check_same_step, on_all_ranks

ONE, TWO = Ranks(0, 1, torch.device("cpu")), Ranks(0, 2, torch.device("cpu"))


@pytest.fixture
def other_rank(monkeypatch):
    """Call it with the number that the second rank has in every reduction: this process stands for two ranks."""
    def has(number):
        monkeypatch.setattr(distributed, "reduce_over_ranks", lambda op, value, ranks: max(value, number))
    return has


def test_ranks_with_different_weights_or_steps_are_noticed(other_rank):
    model = torch.nn.Linear(2, 2)
    check_ranks_agree(model, ONE)
    check_same_step(4, ONE)
    other_rank(8.0)
    with pytest.raises(RuntimeError, match="weights differ"):
        check_ranks_agree(model, TWO)
    with pytest.raises(UserError, match="this one is at step 4.*file system that all machines share"):
        check_same_step(4, TWO)


def test_an_error_on_one_rank_is_raised_on_all(other_rank):
    with pytest.raises(ZeroDivisionError), on_all_ranks(TWO._replace(world=1)):
        raise ZeroDivisionError
    other_rank(0.0)
    with on_all_ranks(TWO):
        pass
    with pytest.raises(UserError, match="mine"), on_all_ranks(TWO):
        raise UserError("mine")
    other_rank(1.0)
    with pytest.raises(UserError, match="another rank failed"), on_all_ranks(TWO):
        pass


def test_a_folder_that_cannot_be_locked_is_one_line_and_leftovers_go(tmp_path):
    (tmp_path / "voice.tmp").mkdir()  # an export that was killed
    (tmp_path / "latest.pt.tmp").touch()
    distributed.lock_folder(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=f"cannot write to out_dir {tmp_path}: .*name another --out_dir"):
        distributed.lock_folder(tmp_path)


def test_signals_ask_for_a_stop_and_a_second_ctrl_c_interrupts():
    hangup, terminate = (signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        with pytest.raises(KeyboardInterrupt), distributed.stop_signals() as asked:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            assert asked == ["SIGTERM", "SIGUSR1"]  # nohup ignores SIGHUP
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
