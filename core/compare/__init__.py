"""`skc compare`: several runs compared with the first of them."""
