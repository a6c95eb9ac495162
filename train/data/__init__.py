"""What is learnt from: photos in their views, captions, caches, and what each step is shown of them."""
