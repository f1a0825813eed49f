"""What a decode loop is made of beside the model: sampling, and Qwen3's thinking under control."""
