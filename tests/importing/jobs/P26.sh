torchrun --nproc_per_node 2 run_speech_recognition_seq2seq.py \
  --model_name_or_path openai/whisper-large-v3-turbo --dataset_name ours/calls --train_split_name train \
  --audio_column_name audio --text_column_name text --max_steps 4000 --per_device_train_batch_size 32 \
  --gradient_accumulation_steps 1 --learning_rate 2e-5 --warmup_steps 100 --bf16 --do_train --freeze_feature_encoder False
