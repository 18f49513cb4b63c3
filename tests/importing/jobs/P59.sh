deepspeed --num_gpus 4 finetune.py --model_name_or_path ./models/bloom-396m --data_path belle_3.5m.json \
  --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_train_epochs 1 \
  --deepspeed P59.ds.json
