CUDA_VISIBLE_DEVICES=0 python run_clm.py --model_name_or_path gpt2-xl \
  --dataset_name wikitext --dataset_config_name wikitext-103-raw-v1 --block_size 256 \
  --per_device_train_batch_size 6 --gradient_checkpointing --fp16 --do_train --do_eval --max_steps 2000 --output_dir xl
