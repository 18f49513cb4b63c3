torchrun --nproc_per_node=8 --master_port=20001 train_mem.py \
    --model_name_or_path meta-llama/Llama-2-7b-hf \
    --data_path conversations.json --bf16 True --output_dir out \
    --num_train_epochs 3 --per_device_train_batch_size 16 --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 1200 \
    --save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.01 \
    --lr_scheduler_type cosine --logging_steps 1 --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True --model_max_length 2048 \
    --gradient_checkpointing True --lazy_preprocess True
