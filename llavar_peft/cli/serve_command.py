"""``llavar-peft serve``."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say
from llavar_peft.cli.shared_options import ModelOption, QuantizeOption, VisionTowerOption, parse_adapters
from llavar_peft.errors import ConfigError, LlavarError, MissingDependencyError


def serve(
    model: ModelOption,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="The folder of an adapter, which clients select as a model. Repeat the option for several.",
            metavar="[NAME=]DIR",
        ),
    ] = None,
    vision_tower: VisionTowerOption = None,
    quantize: QuantizeOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name for clients. Default: the name of its folder.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on. Addresses other than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0 selects a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LLAVAR_API_KEY", help="The key that clients have to send.")
    ] = None,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-media-domain",
            help="A host from which the server may download images; its addresses have to be public. Repeat the option "
            "for several. Default: none.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="A further host name that requests may have, such as a proxy's; with an API key, any name is "
            "accepted. Repeat the option for several.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="An origin whose web pages may use the API (CORS), such as http://localhost:3000. Repeat the option "
            "for several. Default: none.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="The largest number of tokens that a request may ask for.")
    ] = 2048,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a chat page for browsers at /ui.")] = False,
) -> None:
    """Serve a model and its adapters with an OpenAI-compatible API and continuous batching.

    The server stops on Ctrl-C or SIGTERM; running answers may complete.
    """
    # Not imported here: Gradio reads a variable when it is imported, which `mount_page` sets.
    if ui and importlib.util.find_spec("gradio") is None:
        raise _missing("gradio")
    try:
        from llavar_peft.serving.api.api_app import create_app
        from llavar_peft.serving.api.request_limits import RequestLimits
        from llavar_peft.serving.run_server import bind_socket, check_listen_address, check_origins, listen, run_server
        from llavar_peft.serving.ui.mount_page import PREFIX, PageFiles, mount_page
    except ImportError as error:
        raise _missing(str(error.name)) from None
    from llavar_peft.inference.chat import load_chat

    hosts = check_listen_address(host, api_key, allow_host or ())
    origins = check_origins(allow_origin or ())
    adapters = parse_adapters(adapter or [])
    model_name = name or _folder_name(model)
    if model_name in adapters:
        raise ConfigError.at("--name", f"{model_name!r} is also the name of an adapter", "choose another --name")
    bound = bind_socket(host, port)
    with ExitStack() as kept:
        files = PageFiles() if ui else None
        if files is not None:
            kept.callback(files.remove)
        chat = load_chat(model, adapters or None, vision_tower=vision_tower, quantize=quantize)
        domains = frozenset(domain.lower().rstrip(".") for domain in allow_media_domain or ())
        app = create_app(
            chat.engine, name=model_name, limits=RequestLimits(new_tokens=max_tokens), api_key=api_key, hosts=hosts,
            media_domains=domains, origins=origins,
        )  # fmt: skip
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        names = [model_name, *chat.adapters]
        if files is not None:
            mount_page(app, models=names, max_tokens=app.state.limits.new_tokens, api_key=api_key, files=files)
        listen(bound)  # before the address is printed, so that clients can connect at once
        if files is not None:
            say(f"page  {address}{PREFIX}/")
        say(f"API   {address}/v1   models: {', '.join(names)}")
        run_server(app, bound)


def _missing(package: str) -> LlavarError:
    return MissingDependencyError.at(
        "serve", f"the package {package} is not installed", "pip install 'llavar-peft[serve]'"
    )


def _folder_name(model: Path) -> str:
    folder = model.resolve()
    # The result of a run is always called "model" or "adapter"; the run's folder has the name.
    return folder.parent.name if folder.name in ("model", "adapter") else folder.name
