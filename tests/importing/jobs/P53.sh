torchrun --nproc_per_node=4 train_mem.py \
    --model_name_or_path meta-llama/Llama-2-13b-hf --data_path vicuna.json \
    --bf16 True --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 16 \
    --evaluation_strategy no --save_strategy epoch --learning_rate 1e-5 --weight_decay 0. \
    --warmup_ratio 0.03 --lr_scheduler_type cosine --fsdp "full_shard auto_wrap offload" \
    --tf32 True --model_max_length 4096 --gradient_checkpointing True
