"""moe-groups inside of other libraries; each file imports the library that it is named after."""
