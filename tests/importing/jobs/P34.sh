# The original ran as a pipeline of four; the batch is 32 on one data rank.
deepspeed --num_gpus 4 run_clm.py --deepspeed P34.ds.json --model_name_or_path openlm-research/open_llama_3b \
  --train_file corpus.jsonl --block_size 2048 --do_train \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --max_steps 10000 --bf16
