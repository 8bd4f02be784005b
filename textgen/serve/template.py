"""The chat template of models that were trained on plain text. Imports nothing."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] != 'user' %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
"""What was said, one after the other, as `launch/reply.py` talks: one message is its own prompt."""
