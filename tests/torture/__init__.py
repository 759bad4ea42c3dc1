"""The torture suite: `python -m tests.torture` tries to break a cache, and says how often it tried.

Each part is a file with one claim (`PART`) and a generator of rounds; `campaign.py` has what they share, `__main__.py`
is the command. A short form of every part is among the tests (tests/test_torture.py).
"""
