"""What a checkpoint was made from, where no manifest says it."""
