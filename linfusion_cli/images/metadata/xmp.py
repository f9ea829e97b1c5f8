"""XMP packets (ISO 16684-1): metadata for image agencies, search engines and desktop tools."""

import re
from xml.etree import ElementTree

from linfusion_cli.images.metadata.metadata import ImageInfo

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
# Characters that XML 1.0 (section 2.2) cannot represent, and carriage returns, which parsers turn into line feeds.
ILLEGAL_CHARACTERS = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEAD = "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>\n".encode()
TAIL = b"\n<?xpacket end='w'?>"

for _prefix, _uri in NAMESPACES.items():
    ElementTree.register_namespace(_prefix, _uri)


def build_xmp_packet(info: ImageInfo) -> bytes:
    """Return XMP in UTF-8: the software, the IPTC source type for generated images, the prompt and the parameters."""
    meta = ElementTree.Element(_expand_name("x:xmpmeta"))
    rdf = ElementTree.SubElement(meta, _expand_name("rdf:RDF"))
    description = ElementTree.SubElement(rdf, _expand_name("rdf:Description"), {_expand_name("rdf:about"): ""})
    ElementTree.SubElement(description, _expand_name("xmp:CreatorTool")).text = _replace_illegal(info.software)
    ElementTree.SubElement(description, _expand_name("Iptc4xmpExt:DigitalSourceType")).text = SOURCE_TYPE
    _add_text(description, "dc:description", info.prompt)
    _add_text(description, "exif:UserComment", info.parameters)
    return HEAD + ElementTree.tostring(meta, encoding="utf-8", xml_declaration=False) + TAIL


def parse_xmp_user_comment(packet: bytes) -> str | None:
    """Return the A1111 parameters in a packet of `build_xmp_packet`; raise ElementTree.ParseError."""
    path = "/".join(["", "", _expand_name("exif:UserComment"), _expand_name("rdf:Alt"), _expand_name("rdf:li")])
    return ElementTree.fromstring(packet.strip(b"\0 \n")).findtext(f".{path}")


def _add_text(parent: ElementTree.Element, name: str, text: str) -> None:
    """Add `text`, unless it is empty, as a language alternative of x-default."""
    if text:
        alternative = ElementTree.SubElement(
            ElementTree.SubElement(parent, _expand_name(name)), _expand_name("rdf:Alt")
        )
        ElementTree.SubElement(alternative, _expand_name("rdf:li"), {XML_LANG: "x-default"}).text = _replace_illegal(
            text
        )


def _expand_name(short: str) -> str:
    """Return the ElementTree name `{namespace}local` of `prefix:local`."""
    prefix, _, local = short.partition(":")
    return f"{{{NAMESPACES[prefix]}}}{local}"


def _replace_illegal(text: str) -> str:
    return ILLEGAL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
