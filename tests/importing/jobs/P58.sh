deepspeed --num_gpus=8 run_clm.py --deepspeed P58.ds.json --model_name_or_path bigscience/bloom-560m \
  --train_file corpus.txt --validation_split_percentage 5 --block_size 1024 --do_train --do_eval \
  --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --weight_decay 1e-4 \
  --num_train_epochs 1 --output_dir bloom
