"""What several tests share: one module for each purpose."""
