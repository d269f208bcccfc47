"""An HTTP server that speaks OpenAI's and Anthropic's interfaces over the queue: `stoker serve`.

It holds no model and no state: each request becomes a job of the same id, any number of gateways may run, and what one
has begun another goes on with. It imports no MLX and no worker code.
"""
