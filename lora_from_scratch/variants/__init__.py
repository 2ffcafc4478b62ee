"""LoRA's variants, one idea per module; taught in lesson 08."""
