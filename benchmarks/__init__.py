"""shmcache beside its peers, in one run: the same keys, the same values, the same loop.

    pip install -e '.[bench]' && python -m benchmarks

Each peer lives in a process of its own (`runner.py`), so that no peer's threads, collector or allocator disturb
another's figures, and so that uWSGI's cache can be measured where it lives: inside uWSGI. One peer works at a time, in
rounds that go A B C, A B C; a ratio is taken within a round, and the median of the rounds counts (`measure.py`).
"""
