#!/usr/bin/env bash
# Serve a LLaVAR with vLLM from two machines, with one copy of the model on each GPU. Set NODES=1 for one machine.
#
#   machine 0:  HEAD=10.0.0.1 RANK=0 bash examples/vllm.sh llavar-13b
#   machine 1:  HEAD=10.0.0.1 RANK=1 bash examples/vllm.sh llavar-13b
#   anywhere:   python examples/openai_client.py poster.png "Who starred?" --url http://10.0.0.1:8000/v1 --key "$API_KEY"
#
# The machines communicate without encryption (port 13345 and others), so use a private network.
# Merge an adapter first: llavar-peft merge --base llavar-13b --adapter runs/receipts/adapter --out merged
set -euo pipefail

model=${1:?give the folder of a LLaVAR}
nodes=${NODES:-2} rank=${RANK:-0} gpus=${GPUS:-8} head=${HEAD:-127.0.0.1}
: "${API_KEY:?set an API key, because other machines can reach this server}"

# vLLM has no LLaVA projector with a linear activation. The two-sided projector gives bit-identical results.
exported=$model-vllm
[ -e "$exported" ] || llavar-peft convert "$model" "$exported" --to hf-llava --projector two-sided --dtype bfloat16

parallel=(--data-parallel-size $((nodes * gpus)) --data-parallel-size-local "$gpus"
  --data-parallel-address "$head" --data-parallel-rpc-port 13345)
if [ "$rank" -gt 0 ]; then
  exec vllm serve "$exported" --headless --data-parallel-start-rank $((rank * gpus)) "${parallel[@]}"
fi
# Clients send images as data URLs. Downloads are allowed from one host name only, which does not exist.
exec vllm serve "$exported" --served-model-name "$(basename "$model")" --host 0.0.0.0 --port 8000 \
  --api-key "$API_KEY" --limit-mm-per-prompt '{"image": 4}' --allowed-media-domains none.invalid "${parallel[@]}"
