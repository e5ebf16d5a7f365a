"""Streams: requests that arrive in time, queues, and plans made anew every slot."""
