"""The web service around `predict` and `complete`: what `enfilade serve` runs.

    from enfilade.serve.app import create_app
    from enfilade.serve.limits import Settings

    app = create_app(Settings(models=("gad-nyuv2",)))  # an ASGI application

`limits` says what a request may hold, `worker` is the queue before the network, `metrics` counts, and `app` is the
routes. `static` holds the page. Needs the extra `serve`; nothing of it is imported here.
"""
