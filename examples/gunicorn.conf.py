"""How gunicorn runs gunicorn_app.py, which says how to start it."""

bind = "127.0.0.1:8000"
workers = 4

# Both work. With preload_app the application is imported once, before the workers are forked from it; each worker
# enters the cache's process table by itself, at its first use of the cache.
preload_app = True
