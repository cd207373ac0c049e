"""Asks a server about an image with OpenAI's own client: ours, or vLLM with the model that examples/vllm.sh exports.

    llavar-peft serve --model llavar-13b --adapter receipts=runs/receipts/adapter
    python examples/openai_client.py poster.png "Who starred in the movie?" "And when was it?" --model receipts

Each question is a turn of one conversation. The server keeps what it computed of the image and of the turns before.
"""

import argparse
import base64
import mimetypes
from pathlib import Path
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", help="the model or one of its adapters; default: the first")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="the server's --api-key")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.key)
    model = args.model or client.models.list().data[0].id
    kind = mimetypes.guess_type(args.image)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(args.image.read_bytes()).decode()}"
    messages: list[Any] = []
    for question in args.questions:
        first = [{"type": "image_url", "image_url": {"url": url}}] if not messages else []
        messages.append({"role": "user", "content": [{"type": "text", "text": question}, *first]})
        answer = ""
        stream = client.chat.completions.create(
            model=model, messages=messages, temperature=args.temperature, max_tokens=args.max_tokens, stream=True
        )
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            print(piece or "", end="", flush=True)
            answer += piece or ""
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
