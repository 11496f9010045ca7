"""The assistant as a service: OpenAI's chat completions, live video, and a page to look at.

The way of one request: `protocol` (its deadline) → `gate` (key, size) → `completions` → `schema`
(strict) → `admission` (a slot, or 429) → `media` (`fetching`, `spool`, the sandbox) → the
assistant, in a thread → `completions` again, as JSON or as events.
"""
