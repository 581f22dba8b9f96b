import pytest
from tests.distributed.launch import run_ranks
from tests.distributed.deepspeed_ranks import start_deepspeed
from tests.distributed.deepspeed_rules import rules_of_stages


def go(rank, folder):
    start_deepspeed(rank)
    import time

    t = time.monotonic()
    r = rules_of_stages(rank, folder)
    return r, time.monotonic() - t


@pytest.mark.parametrize("n", [2, 3, 4])
def test_it(n, tmp_path):
    out = run_ranks(go, n, tmp_path, timeout=200)
    print(n, "seconds", out[0][1])
    bad = [
        (rank, st, k, v)
        for rank, (o, _) in enumerate(out)
        for st, d in o.items()
        for k, v in d.items()
        if v and "not run" not in v
    ]
    for b in bad:
        print(*b)
    assert not bad
