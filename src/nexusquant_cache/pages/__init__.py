"""What results look like: pages that need no other file, and pictures; knows nothing of caches."""
