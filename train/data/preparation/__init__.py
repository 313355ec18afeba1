"""Token stores are made: sources of text, their readers, parallel tokenization, the writer; and of other stores."""
