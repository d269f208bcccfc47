"""What Stoker adds to Celery and kombu: the app, its boot, lanes and their requests, the lease, the transport.

Inside this package `import celery` is Celery itself.
"""
