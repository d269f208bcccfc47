"""What Stoker adds to Celery and kombu: the app, its boot, lanes and their requests, the lease, the transport.

Who holds a message when: docs/architecture.md#a-message-of-the-queue.

Inside this package `import celery` is Celery itself.
"""
