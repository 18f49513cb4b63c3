"""The wish: what a person writes, validated. Pure; never imports torch."""
