"""``llavar-peft serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say
from llavar_peft.cli.shared_options import ModelOption, QuantizeOption, VisionTowerOption, name_adapters
from llavar_peft.errors import ConfigError, MissingDependencyError


def serve(
    model: ModelOption,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="An adapter, a model to clients; may be given again.", metavar="[NAME=]DIR"),
    ] = None,
    vision_tower: VisionTowerOption = None,
    quantize: QuantizeOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; default: its folder.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Elsewhere than here only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LLAVAR_API_KEY", help="Clients have to know it.")
    ] = None,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option("--allow-media-domain", help="A host that pictures may be fetched from; may be given again."),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A page for people as well, at /ui.")] = False,
) -> None:
    """Serve a model by OpenAI's API, with continuous batching, in one process."""
    try:
        from llavar_peft.serving.api.api_app import create_app
        from llavar_peft.serving.run_server import check_listen_address, listen
        from llavar_peft.serving.run_server import run_server as run
    except ImportError as error:
        raise MissingDependencyError.at(
            "serve", f"{error.name} is missing", "pip install 'llavar-peft[serve]'"
        ) from None
    from llavar_peft.inference.chat import load_chat

    hosts = check_listen_address(host, api_key)
    adapters = name_adapters(adapter or [])
    called = name or _folder_name(model)
    if called in adapters:
        raise ConfigError.at("--name", f"{called!r} is an adapter's name too", "give another --name")
    bound = listen(host, port)
    chat = load_chat(model, adapters or None, vision_tower=vision_tower, quantize=quantize)
    domains = frozenset(domain.lower().rstrip(".") for domain in allow_media_domain or ())
    app = create_app(chat.engine, name=called, api_key=api_key, hosts=hosts, media_domains=domains)
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    if ui:
        from llavar_peft.serving.ui.mount_page import PREFIX, mount_page

        mount_page(app, models=[called, *chat.adapters], most_tokens=app.state.limits.new_tokens, api_key=api_key)
        say(f"page  {address}{PREFIX}/")
    say(f"API   {address}/v1   models: {', '.join([called, *chat.adapters])}")
    run(app, bound)


def _folder_name(model: Path) -> str:
    folder = model.resolve()
    # A run's result says little; the run's name does.
    return folder.parent.name if folder.name in ("model", "adapter") else folder.name
