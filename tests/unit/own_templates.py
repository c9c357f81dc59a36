"""What the families' own chat templates write, rebuilt from their documented formats.

Each keeps the rule that makes its family special: blocks that depend on images or on the day,
trimming, system texts that move, think blocks. Wording that changes no rule is left out.
"""

from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

PARTS = (  # a message's parts in their order, TEXT, IMAGE and VIDEO to be replaced
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% elif part.type == 'video' %}VIDEO{% else %}TEXT{% endif %}{% endfor %}"
)


def parts(image: str, text: str = "{{ part.text }}", video: str = "") -> str:
    return PARTS.replace("IMAGE", image).replace("VIDEO", video).replace("TEXT", text)


SMOLVLM = DEFAULT_CHAT_TEMPLATE  # Idefics3's is the same
# all images first, and a space after the role that the generation prompt does not have
LLAVA_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}<video>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHATML = (
    "<|im_start|>{{ message.role }}\n" + parts("MARK", video="FILM") + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"
_FILM = _VISION.replace("image", "video")
QWEN3_VL = "{% for message in messages %}" + _CHATML.replace("MARK", _VISION).replace("FILM", _FILM)
QWEN2_VL = (  # Qwen2.5-VL's is the same: a default system text
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + _CHATML.replace("MARK", _VISION).replace("FILM", _FILM)
)
INTERNVL = "{% for message in messages %}" + _CHATML.replace("MARK", "<IMG_CONTEXT>\n").replace(
    "FILM", "<video>\n"
)
# the system text opens the first question; texts are trimmed; the assistant is called model
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set opening = messages[0].content[0].text + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set opening = '' %}{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ opening if loop.first else '' }}"
    + parts("<start_of_image>", "{{ part.text | trim }}")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# a dated system block, written without images alone; images and a system turn exclude each other
MLLAMA = (
    "{{ bos_token }}{% set found = namespace(images=false) %}{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{% set found.images = true %}"
    "{% endif %}{% endfor %}{% endfor %}{% if messages[0].role == 'system' %}"
    "{% if found.images %}{{ raise_exception('images exclude a system message') }}{% endif %}"
    "{% set text = messages[0].content[0].text | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set text = '' %}{% endif %}{% if not found.images %}"
    + _HEADER.format("system")
    + "Cutting Knowledge Date: December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ text }}<|eot_id|>{% endif %}{% for message in messages %}"
    + _HEADER.format("{{ message.role }}")
    + parts("<|image|>")
    + "<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    + _HEADER.format("assistant")
    + "{% endif %}"
)
# the system text stands in the last question
PIXTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content[0].text %}{% set messages = messages[1:] %}{% endif %}"
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST]"
    "{% if message == last and system is defined %}{{ system }}\n\n{% endif %}"
    + parts("[IMG]")
    + "[/INST]{% else %}"
    + parts("")
    + "{{ eos_token }}{% endif %}{% endfor %}"
)
# a system block with the day always opens the prompt; Llama 3.1 has a fixed day by default
LLAMA_3_2 = (
    "{{ bos_token }}{% if date_string is not defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}'
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set text = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set text = '' %}{% endif %}"
    + _HEADER.format("system")
    + "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ text }}<|eot_id|>"
    "{% for message in messages %}"
    + _HEADER.format("{{ message.role }}")
    + "{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    + _HEADER.format("assistant")
    + "{% endif %}"
)
LLAMA_3_1 = LLAMA_3_2.replace("strftime_now is defined", "false")
# reasoning is kept in the last answer alone, which gets an empty block if it has none
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set text = m.content %}{% set reasoning = '' %}{% if '</think>' in text %}"
    "{% set reasoning = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.last %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{{ text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
    "enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
