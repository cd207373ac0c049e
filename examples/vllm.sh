#!/usr/bin/env bash
# Serve a LLaVAR with vLLM from two machines, with one copy of the model on each GPU. Set NODES=1 for one machine.
#
#   machine 0:  HEAD=10.0.0.1 RANK=0 bash examples/vllm.sh llavar-13b
#   machine 1:  HEAD=10.0.0.1 RANK=1 bash examples/vllm.sh llavar-13b
#   anywhere:   python examples/openai_client.py poster.png "Who starred?" --url http://10.0.0.1:8000/v1 --key "$API_KEY"
#
# The machines communicate without encryption (port 13345 and others), so use a private network.
# Merge an adapter first: llavar-peft merge --base llavar-13b --adapter runs/receipts/adapter --out merged
#
# vLLM runs the model's code in transformers. Set NATIVE=1 for vLLM's own LLaVA, which has the towers CLIP and SigLIP only.
set -euo pipefail

model=${1:?give the folder of a LLaVAR}
model=${model%/}  # the export goes beside it
nodes=${NODES:-2} rank=${RANK:-0} gpus=${GPUS:-8} head=${HEAD:-127.0.0.1}
: "${API_KEY:?set an API key, because other machines can reach this server}"

exported=$model-vllm
[ -e "$exported" ] || llavar-peft convert "$model" "$exported" --to hf-llava --dtype bfloat16

how=(--model-impl transformers)
if [ "${NATIVE:-0}" = 1 ]; then
  how=(--model-impl vllm)
  # vLLM has another name for the activation of a linear projector.
  if grep -q '"projector_hidden_act": "linear"' "$exported/config.json"; then
    how+=(--hf-overrides '{"projector_hidden_act": "torch.nn.modules.linear.Identity"}')
  fi
fi

parallel=(--data-parallel-size $((nodes * gpus)) --data-parallel-size-local "$gpus"
  --data-parallel-address "$head" --data-parallel-rpc-port 13345)
if [ "$rank" -gt 0 ]; then
  exec vllm serve "$exported" "${how[@]}" --headless --data-parallel-start-rank $((rank * gpus)) "${parallel[@]}"
fi
# Clients send images as data URLs. Downloads are allowed from one host name only, which does not exist.
exec vllm serve "$exported" "${how[@]}" --served-model-name "$(basename "$model")" --host 0.0.0.0 --port 8000 \
  --api-key "$API_KEY" --limit-mm-per-prompt '{"image": 4}' --allowed-media-domains none.invalid "${parallel[@]}"
