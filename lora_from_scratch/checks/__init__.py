"""What is wrong with this run or with this file? See doctor."""
