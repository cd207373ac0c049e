"""Ask a server about an image with OpenAI's client.

    llavar-peft serve --model llavar-13b --adapter receipts=runs/receipts/adapter
    python examples/openai_client.py poster.png "Who starred in the movie?" "And when was it?" --model receipts

The server is llavar-peft, or vLLM as started by examples/vllm.sh. The questions form one conversation, and the server
reuses its computation for the image and the earlier questions.
"""

import argparse
import base64
import mimetypes
from pathlib import Path
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--model", help="The model or one of its adapters. Default: the first.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="The server's API key.")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--max-tokens", type=int, default=512, help="Largest number of tokens in an answer.")
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
