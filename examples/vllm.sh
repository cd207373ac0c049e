#!/usr/bin/env bash
# Serves a LLaVAR from two machines with vLLM, one copy of the model on each GPU; one machine is enough with NODES=1.
#
#   machine 0:  HEAD=10.0.0.1 RANK=0 bash examples/vllm.sh llavar-13b
#   machine 1:  HEAD=10.0.0.1 RANK=1 bash examples/vllm.sh llavar-13b
#   anywhere:   python examples/openai_client.py poster.png "Who starred?" --url http://10.0.0.1:8000/v1 --key "$API_KEY"
#
# The machines talk to each other unprotected (port 13345 and others): keep them in a network of their own.
# An adapter is merged first: llavar-peft merge --base llavar-13b --adapter runs/receipts/adapter --out merged
set -euo pipefail

model=${1:?a LLaVAR, as folder}
nodes=${NODES:-2} rank=${RANK:-0} gpus=${GPUS:-8} head=${HEAD:-127.0.0.1}
: "${API_KEY:?others can reach this server: set a key for it}"

# vLLM knows LLaVA, but no projector without activation between its layers: two-sided is the same to the last bit.
exported=$model-vllm
[ -e "$exported" ] || llavar-peft convert "$model" "$exported" --to hf-llava --projector two-sided --dtype bfloat16

parallel=(--data-parallel-size $((nodes * gpus)) --data-parallel-size-local "$gpus"
  --data-parallel-address "$head" --data-parallel-rpc-port 13345)
if [ "$rank" -gt 0 ]; then
  exec vllm serve "$exported" --headless --data-parallel-start-rank $((rank * gpus)) "${parallel[@]}"
fi
# Pictures come as the clients' own data: no address has the one name that may be fetched from.
exec vllm serve "$exported" --served-model-name "$(basename "$model")" --host 0.0.0.0 --port 8000 \
  --api-key "$API_KEY" --limit-mm-per-prompt '{"image": 4}' --allowed-media-domains none.invalid "${parallel[@]}"
