torchrun --nproc_per_node 2 run_speech_recognition_seq2seq.py \
  --model_name_or_path openai/whisper-small --dataset_name ours/voices --dataset_config_name hi --language hindi --task transcribe \
  --train_split_name train --eval_split_name test --audio_column_name audio --text_column_name sentence \
  --max_steps 5000 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --gradient_accumulation_steps 4 \
  --learning_rate 1e-5 --warmup_steps 200 --eval_strategy steps --eval_steps 1000 --save_strategy steps --save_steps 1000 \
  --max_duration_in_seconds 30 --freeze_feature_encoder False --gradient_checkpointing --fp16 --do_train --do_eval --predict_with_generate
